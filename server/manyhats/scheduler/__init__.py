"""Who runs in the next step: pure policy, with no tensor and no clock of its own."""
