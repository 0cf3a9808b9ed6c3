"""What belongs into OpenMMLab's packages: each module is a patch that stands by itself, for as long
as the upstream call that it names does not do the same."""
