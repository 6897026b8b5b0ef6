"""Products of many rows: panels of a matrix that stay in the cache while all rows are multiplied."""
