//! Metrics, status page, dashboards and alerts.

mod dashboards;
mod status_page;
