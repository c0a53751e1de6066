"""The main job on a real model: train adapters on MiniLM, save, load, serve, and compare with PEFT."""
