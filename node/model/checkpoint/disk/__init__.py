"""The models in the cache: their sizes, the processes that use them, and a bound for all of them."""
