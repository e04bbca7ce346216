"""Which formats, at what cost: errors per format, the optimiser, calibration, forecasts."""
