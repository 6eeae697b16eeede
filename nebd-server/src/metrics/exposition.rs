//! The text format of Prometheus, version 0.0.4.
//!
//! A [`Family`] writes its head when it is begun, so that each metric is there even while it has no
//! sample, and all its samples follow in one piece, as the format demands.

use std::fmt::Write as _;

/// What `Content-Type` says of this format.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// How values of a metric behave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only ever grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Counts by upper bounds, a sum and a count.
    Histogram,
    /// A sum and a count.
    Summary,
}

impl Kind {
    /// As the format calls it.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
            Kind::Summary => "summary",
        }
    }
}

/// A metric.
#[derive(Debug)]
pub struct Metric {
    /// Its name, with its unit.
    pub name: &'static str,
    /// How it behaves.
    pub kind: Kind,
    /// What tells its samples apart.
    pub labels: &'static [&'static str],
    /// What it says.
    pub help: &'static str,
}

/// A text that grows.
#[derive(Debug, Default)]
pub struct Exposition {
    text: String,
}

/// The samples of one metric.
#[derive(Debug)]
pub struct Family<'a> {
    text: &'a mut String,
    metric: &'a Metric,
}

impl Exposition {
    /// Begins a metric; each once.
    pub fn family<'a>(&'a mut self, metric: &'a Metric) -> Family<'a> {
        let Metric { name, kind, help, .. } = metric;
        let help = help.replace('\\', "\\\\").replace('\n', "\\n");
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {}", kind.name());
        Family { text: &mut self.text, metric }
    }

    /// The whole text.
    pub fn finish(self) -> String {
        self.text
    }
}

impl Family<'_> {
    /// A sample; `values` are those of the metric's labels, in their order.
    pub fn sample(&mut self, values: &[&str], value: f64) {
        self.line("", values, None, value);
    }

    /// A sum and how many it is of.
    pub fn summary(&mut self, values: &[&str], sum: f64, count: u64) {
        self.line("_sum", values, None, sum);
        self.line("_count", values, None, count as f64);
    }

    /// A histogram: for each bound how many are not beyond it, their sum, and how many there are.
    pub fn histogram(&mut self, values: &[&str], buckets: &[(f64, u64)], sum: f64, count: u64) {
        for (bound, below) in buckets {
            self.line("_bucket", values, Some(*bound), *below as f64);
        }
        self.line("_bucket", values, Some(f64::INFINITY), count as f64);
        self.summary(values, sum, count);
    }

    fn line(&mut self, suffix: &str, values: &[&str], bound: Option<f64>, value: f64) {
        debug_assert_eq!(values.len(), self.metric.labels.len());
        self.text.push_str(self.metric.name);
        self.text.push_str(suffix);
        let mut separator = '{';
        for (label, value) in self.metric.labels.iter().zip(values) {
            let _ = write!(self.text, "{separator}{label}=\"");
            escape(self.text, value);
            self.text.push('"');
            separator = ',';
        }
        if let Some(bound) = bound {
            let _ = write!(self.text, "{separator}le=\"");
            number(self.text, bound);
            self.text.push('"');
            separator = ',';
        }
        self.text.push_str(if separator == ',' { "} " } else { " " });
        number(self.text, value);
        self.text.push('\n');
    }
}

fn escape(text: &mut String, value: &str) {
    for character in value.chars() {
        match character {
            '\\' => text.push_str("\\\\"),
            '"' => text.push_str("\\\""),
            '\n' => text.push_str("\\n"),
            // The format allows them; terminals and browsers do not take them well.
            character if character.is_control() => text.push('\u{fffd}'),
            character => text.push(character),
        }
    }
}

/// Whole numbers in full, others as short as they can be read back.
fn number(text: &mut String, value: f64) {
    let _ = match value {
        value if value == f64::INFINITY => write!(text, "+Inf"),
        value => write!(text, "{value}"),
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_escaped_and_numbers_are_plain() {
        let metric = |name, kind, labels| Metric { name, kind, labels, help: "a\\b\nc" };
        let plain = metric("a_total", Kind::Counter, &[]);
        let labelled = metric("b", Kind::Gauge, &["x", "y"]);
        let times = metric("c_seconds", Kind::Histogram, &["x"]);
        let mut out = Exposition::default();
        out.family(&plain).sample(&[], 9_007_199_254_740_991.0);
        out.family(&labelled).sample(&["a\"b\\c\nd\re", "ü"], 0.25);
        out.family(&times).histogram(&["v"], &[(0.000_008, 1), (67.108_864, 2)], 1.5, 3);
        let expected = "\
# HELP a_total a\\\\b\\nc
# TYPE a_total counter
a_total 9007199254740991
# HELP b a\\\\b\\nc
# TYPE b gauge
b{x=\"a\\\"b\\\\c\\nd\u{fffd}e\",y=\"ü\"} 0.25
# HELP c_seconds a\\\\b\\nc
# TYPE c_seconds histogram
c_seconds_bucket{x=\"v\",le=\"0.000008\"} 1
c_seconds_bucket{x=\"v\",le=\"67.108864\"} 2
c_seconds_bucket{x=\"v\",le=\"+Inf\"} 3
c_seconds_sum{x=\"v\"} 1.5
c_seconds_count{x=\"v\"} 3
";
        assert_eq!(out.finish(), expected);
    }
}
