"""What adversarial training bought: robustness, calibration, and what the neurons know."""
