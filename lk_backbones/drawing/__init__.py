"""Pictures of what a task does. Knows no task."""
