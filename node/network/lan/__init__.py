"""The peers of one local network find each other by multicast DNS, without a configuration."""
