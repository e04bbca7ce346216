"""Parts of one plan on the machines of a Ray cluster.

The cluster never finishes a run. Its tasks write whole files, each part with a journal of its own, just as `--part`
does by hand; the ordinary run of the same plan then takes in what they finished, writes what is missing, and ends the
conversion. So whatever dies, nothing is lost that was recorded, and the folder is that of a single machine.

Ray ends a process that has lost the cluster's head, in its own words. So it lives in a process of its own
(`scheduler`), which the run (`parts`) starts, listens to, and outlives. What a machine does is `task`; what it has to
show before it may is `proof`.
"""
