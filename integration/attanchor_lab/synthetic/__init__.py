"""The laboratory: does AttAnchor help? Rendered scenes, arms that differ in one thing, statistics that say how sure.

Everything is generated on the device that trains, so one code serves all sizes: `attanchor lab`. What came out is
turned into a page by `attanchor report`. docs/proving-ground.md says how to run and read it.
"""
