"""From the files of results to the tables and pictures of the documents."""
