//! Builder of metric families from plain numbers.

use prometheus::proto::{
    Bucket, Counter, Gauge, Histogram, LabelPair, Metric, MetricFamily, MetricType,
};
use skein_ipc::HistogramReport;

/// Type of a metric family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Counter,
    Gauge,
    Histogram,
}

/// Metric family under construction.
pub(super) struct Family {
    kind: Kind,
    name: String,
    help: String,
    metrics: Vec<Metric>,
}

impl Family {
    pub(super) fn new(name: &str, help: &str, kind: Kind) -> Self {
        Self { kind, name: name.to_owned(), help: help.to_owned(), metrics: Vec::new() }
    }

    /// Adds a series of a counter or gauge.
    pub(super) fn add(&mut self, labels: &[(&str, &str)], value: f64) {
        let mut metric = labelled(labels);
        match self.kind {
            Kind::Counter => {
                let mut counter = Counter::default();
                counter.set_value(value);
                metric.set_counter(counter);
            }
            Kind::Gauge | Kind::Histogram => {
                let mut gauge = Gauge::default();
                gauge.set_value(value);
                metric.set_gauge(gauge);
            }
        }
        self.metrics.push(metric);
    }

    /// Adds a series of a histogram.
    pub(super) fn add_histogram(&mut self, labels: &[(&str, &str)], report: &HistogramReport) {
        let mut cumulative = 0;
        let bounds = HistogramReport::BOUNDS.iter().map(|&bound| bound as f64);
        // The encoder adds the infinite bucket from the count.
        let buckets = bounds.zip(&report.buckets).map(|(bound, count)| {
            cumulative += count;
            let mut bucket = Bucket::default();
            bucket.set_upper_bound(bound);
            bucket.set_cumulative_count(cumulative);
            bucket
        });
        let mut histogram = Histogram::default();
        histogram.set_bucket(buckets.collect());
        histogram.set_sample_count(report.count());
        histogram.set_sample_sum(report.sum as f64);
        let mut metric = labelled(labels);
        metric.set_histogram(histogram);
        self.metrics.push(metric);
    }

    pub(super) fn finish(self) -> MetricFamily {
        let mut family = MetricFamily::default();
        family.set_name(self.name);
        family.set_help(self.help);
        family.set_field_type(match self.kind {
            Kind::Counter => MetricType::COUNTER,
            Kind::Gauge => MetricType::GAUGE,
            Kind::Histogram => MetricType::HISTOGRAM,
        });
        family.set_metric(self.metrics);
        family
    }
}

fn labelled(labels: &[(&str, &str)]) -> Metric {
    let pairs = labels.iter().map(|(name, value)| {
        let mut pair = LabelPair::default();
        pair.set_name((*name).to_owned());
        pair.set_value((*value).to_owned());
        pair
    });
    Metric::from_label(pairs.collect())
}
