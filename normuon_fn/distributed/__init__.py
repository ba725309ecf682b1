"""Sharded and replicated matrices: who stores, who orthogonalizes and who sends what.

Read dtensors.py (what is a DTensor), shards.py and placements.py (the parts of a tensor), owners.py
(the owner of every matrix), fields.py, directions.py and messages.py (what the ranks of a bucket
send each other), share.py (the stages of a bucket on many ranks); orthogonalize.py stands alone,
with the public function. Except for share.py, nothing here knows plans or names of parameters: it
knows groups and ranks.
"""
