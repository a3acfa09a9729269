"""The tests: each with a bound on its false alarms that holds for any number of samples."""
