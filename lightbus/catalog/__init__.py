"""Which apps are on the bus, what they publish and what they subscribe to: contracts, kept on the broker.

Commands read them; a worker publishes its app's. Imports: `inspection` and what is above it in the list of modules, no
command. `import lightbus` does not import this package.
"""
