//! Metrics, status page, dashboards and alerts.

mod dashboards;
mod metrics;
mod status_page;
