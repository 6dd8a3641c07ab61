"""Taps for hosts of other libraries. Each file needs its library; nothing here is imported by the rest."""
