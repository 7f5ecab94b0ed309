"""The compress road: the stages calibrate, select, parameters, pack; their order; and how a run resumes."""
