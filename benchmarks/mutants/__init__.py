"""How strong the tests are: small changes to pure modules, and how many of them a test notices."""
