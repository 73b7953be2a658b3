"""The network: modules that declare their placements, composed into a flat program."""
