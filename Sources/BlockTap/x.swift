// BlockTap
