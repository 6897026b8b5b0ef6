"""Steps of many sessions at one moment: without a task of each, and in shared frames."""
