"""The table of brokers: what differs between them, one row for each. All other code reads the row of its address.

Imports: errors. Nothing connects.
"""
