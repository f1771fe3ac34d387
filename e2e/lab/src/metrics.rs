//! Metrics of an agent, as its HTTP server returns them.

/// Metrics in the text format of Prometheus.
#[derive(Debug, Clone)]
pub struct Metrics(pub String);

impl Metrics {
    /// Returns the sum of all series of a metric whose labels contain each of `labels`
    /// (`key="value"`); 0 if no series matches.
    pub fn sum(&self, name: &str, labels: &[&str]) -> f64 {
        let value = |line: &str| {
            let (series, value) = line.rsplit_once(' ')?;
            let (metric, set) = series.split_once('{').unwrap_or((series, ""));
            let wanted = metric == name && labels.iter().all(|label| set.contains(label));
            wanted.then(|| value.parse::<f64>().ok()).flatten()
        };
        self.0.lines().filter(|line| !line.starts_with('#')).filter_map(value).sum()
    }
}
