"""What `compare.py` consists of: peers, selections, the reference in f64, timing, the record."""
