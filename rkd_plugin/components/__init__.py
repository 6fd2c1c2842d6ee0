"""What a recipe may name: data sets, models, samplers, baselines and few-shot losses."""
