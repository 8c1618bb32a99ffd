"""One module per backend; each exports functions named and called like the operations in
lowbit/ops.py.
"""
