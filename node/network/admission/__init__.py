"""The admission of peers: rates of arrival, and places that networks, addresses and peers share fairly."""
