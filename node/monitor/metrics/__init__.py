"""Numbers for programs: the metrics of a process, in the formats of Prometheus."""
