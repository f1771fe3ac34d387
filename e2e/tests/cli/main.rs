//! Operators' commands of `skein-agent`.

mod commands;
mod status;
mod support;
mod watching;
