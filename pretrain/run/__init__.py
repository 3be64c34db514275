"""What a run leaves on disk: its folder, events, record, lock and heartbeats. Nothing here imports torch."""
