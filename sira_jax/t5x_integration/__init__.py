"""T5X as a training engine, by gin. Nothing else of the library imports T5X, and importing this package does not either."""
