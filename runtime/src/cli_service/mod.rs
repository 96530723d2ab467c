//! The CLI's own service, `caisson.cli.v1`.
