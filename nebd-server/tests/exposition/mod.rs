//! A strict reader of Prometheus' text format, version 0.0.4: it refuses whatever the format does
//! not say in so many words, and whatever makes no sense of a histogram or counter.

use std::collections::{BTreeMap, BTreeSet};

/// Samples of one metric, by name (with its suffix) and labels.
#[derive(Debug)]
pub struct Family {
    pub kind: String,
    pub samples: BTreeMap<(String, Labels), f64>,
}

pub type Labels = BTreeMap<String, String>;

/// Every metric of a text, by name. Panics with the line that is wrong.
pub fn parse(text: &str) -> BTreeMap<String, Family> {
    assert!(text.ends_with('\n'), "the last line has no end");
    let mut families: BTreeMap<String, Family> = BTreeMap::new();
    let mut helped: Option<String> = None;
    let mut open: Option<String> = None;
    for line in text.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, text) = help.split_once(' ').unwrap_or_else(|| panic!("no help: {line}"));
            assert!(is_name(name) && !text.is_empty(), "{line}");
            helped = Some(name.to_owned());
        } else if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').unwrap_or_else(|| panic!("no type: {line}"));
            assert_eq!(helped.take().as_deref(), Some(name), "HELP comes right before: {line}");
            assert!(matches!(kind, "counter" | "gauge" | "histogram" | "summary"), "{line}");
            assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
            let family = Family { kind: kind.to_owned(), samples: BTreeMap::new() };
            assert!(families.insert(name.to_owned(), family).is_none(), "twice: {line}");
            open = Some(name.to_owned());
        } else {
            assert!(!line.is_empty() && !line.starts_with('#'), "{line:?}");
            let (name, labels, value) = sample(line);
            let open = open.as_deref().unwrap_or_else(|| panic!("a sample of nothing: {line}"));
            let family = families.get_mut(open).unwrap();
            assert!(belongs(&name, open, &family.kind, &labels), "{line} is no part of {open}");
            let before = family.samples.insert((name, labels), value);
            assert!(before.is_none(), "the same sample twice: {line}");
        }
    }
    families.iter().for_each(|(name, family)| check(name, family));
    families
}

fn is_name(name: &str) -> bool {
    let mut bytes = name.bytes();
    let first = |b: u8| b.is_ascii_alphabetic() || b == b'_';
    bytes.next().is_some_and(first) && bytes.all(|b| first(b) || b.is_ascii_digit())
}

fn belongs(name: &str, family: &str, kind: &str, labels: &Labels) -> bool {
    let suffix = name.strip_prefix(family);
    let bounded = labels.contains_key("le");
    match (kind, suffix) {
        ("counter" | "gauge", Some("")) => !bounded,
        ("histogram" | "summary", Some("_sum" | "_count")) => !bounded,
        ("histogram", Some("_bucket")) => bounded,
        _ => false,
    }
}

fn sample(line: &str) -> (String, Labels, f64) {
    let end = line.find(['{', ' ']).unwrap_or_else(|| panic!("no value: {line}"));
    let (name, mut rest) = line.split_at(end);
    assert!(is_name(name), "{line}");
    let mut labels = Labels::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        loop {
            let (label, value) = rest.split_once("=\"").unwrap_or_else(|| panic!("{line}"));
            assert!(is_name(label), "{label}: {line}");
            let (value, after) = quoted(value, line);
            assert!(labels.insert(label.to_owned(), value).is_none(), "{line}");
            match after.split_at(1) {
                (",", more) => rest = more,
                ("}", more) => break rest = more,
                _ => panic!("{line}"),
            }
        }
    }
    let value = rest.strip_prefix(' ').unwrap_or_else(|| panic!("{line}"));
    assert!(value.bytes().all(|b| b.is_ascii_digit() || b"+-.eInf".contains(&b)), "{line}");
    (name.to_owned(), labels, value.parse().unwrap_or_else(|_| panic!("{line}")))
}

/// The text up to the closing quote, and what follows it.
fn quoted<'a>(text: &'a str, line: &str) -> (String, &'a str) {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return (value, &text[at + 1..]),
            '\\' => value.push(match chars.next() {
                Some((_, '\\')) => '\\',
                Some((_, '"')) => '"',
                Some((_, 'n')) => '\n',
                other => panic!("the escape {other:?}: {line}"),
            }),
            c => value.push(c),
        }
    }
    panic!("a quote that does not end: {line}");
}

fn check(name: &str, family: &Family) {
    let keys: BTreeSet<Vec<&str>> = family
        .samples
        .keys()
        .map(|(_, labels)| {
            labels.keys().map(String::as_str).filter(|label| *label != "le").collect()
        })
        .collect();
    assert!(keys.len() <= 1, "{name}: samples with different labels");
    if family.kind != "gauge" {
        assert!(family.samples.values().all(|value| *value >= 0.0), "{name}: less than nothing");
    }
    if family.kind != "histogram" {
        return;
    }
    let mut series: BTreeMap<Labels, Vec<(f64, f64)>> = BTreeMap::new();
    for ((sample, labels), value) in &family.samples {
        let mut labels = labels.clone();
        if let Some(bound) = labels.remove("le") {
            assert!(sample.ends_with("_bucket"));
            let bound = if bound == "+Inf" { f64::INFINITY } else { bound.parse().unwrap() };
            series.entry(labels).or_default().push((bound, *value));
        }
    }
    for (labels, mut buckets) in series {
        buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
        assert!(buckets.windows(2).all(|pair| pair[0].1 <= pair[1].1), "{name}{labels:?} falls");
        let (last, count) = *buckets.last().unwrap();
        assert_eq!(last, f64::INFINITY, "{name}{labels:?}");
        assert_eq!(family.samples[&(format!("{name}_count"), labels.clone())], count);
        assert!(family.samples.contains_key(&(format!("{name}_sum"), labels)), "{name}");
    }
}
