"""The network. It asks for no rank beyond the stage, the sequence shard and the process groups that it is given."""
