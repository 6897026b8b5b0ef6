"""Sessions that go on over another stream."""
