"""Sharded and replicated matrices: who stores, who orthogonalizes and who sends what.

Read dtensors.py (what is a DTensor), shards.py and placements.py (the parts of a tensor), owners.py
(the owner of every matrix), the picture in messages.py, and then fields.py, hops.py, directions.py
and messages.py (what the ranks of a bucket send each other, and by way of whom), shared.py and
owned.py (the stages of a bucket on many ranks). cost.py predicts, and sharing.py decides by it;
groups.py makes process groups; agreement.py and failures.py are about ranks that differ or end;
orthogonalize.py stands alone, with the public function. Except for shared.py and owned.py, nothing
here knows plans or names of parameters: it knows groups and ranks.
"""
