"""What runs on the GPU: functions in Triton's language, compiled at their first launch for each set of types."""
