//! Operators' commands of `skein-agent`.

mod commands;
