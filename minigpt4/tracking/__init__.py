"""What a run tells about itself: metrics.jsonl, trackers, its environment, plots and a report. torch is not needed."""
