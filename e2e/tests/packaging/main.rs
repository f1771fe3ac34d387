//! Helm chart, container image, and files for the host.

mod chart;
mod chart_admission;
mod chart_configuration;
mod chart_monitoring;
mod chart_values;
mod host_files;
mod image;
