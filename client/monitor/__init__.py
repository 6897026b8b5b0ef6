"""What a program that watches a swarm asks of it: live sessions, who answers, a stream of events."""
