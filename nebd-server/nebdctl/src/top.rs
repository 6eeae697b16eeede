//! `nebdctl top`
//!
//! ```text
//!   look ─► wait ─► look ─► rates between the two ─► screen, or a line of JSON ─┐
//!             ▲                                                                 │
//!             └──────── no answer: the last screen, and since when ◄────────────┘
//! ```
//!
//! Counters outlive the server, so rates go on over a takeover.

mod rates;
mod terminal;

use std::fmt::Write as _;
use std::io::{self, IsTerminal as _, Write as _};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context as _;
use nebd_rpc::admin::{GetStatusRequest, Status, Takeover, Volume};
use serde::Serialize;

use crate::cli::TopArgs;
use crate::connection::Connection;
use crate::demo::process::{is_interrupted, watch_interrupts};
use crate::failure::Failure;
use crate::table::Table;
use crate::units::{Count, Micros};
use crate::view;
use rates::Rates;
use terminal::Terminal;

/// How long the live view waits for an answer before it says that there is none.
const PATIENCE: Duration = Duration::from_secs(1);

/// The server at one moment.
struct Look {
    status: Status,
    at: Instant,
}

fn look(connection: &Connection) -> Result<Look, Failure> {
    let request = GetStatusRequest { counters: true };
    let status = connection.call(|mut c| async move { c.get_status(request).await })?;
    Ok(Look { status, at: Instant::now() })
}

/// Shows what goes on; returns what is left to print.
pub fn run(socket: &Path, connection: &Connection, args: &TopArgs) -> Result<String, Failure> {
    watch_interrupts().context("cannot catch Ctrl-C")?;
    let interval = Duration::from_secs_f64(args.interval);
    // Whoever asks first is told why there is no answer.
    let first = look(connection)?;
    if args.once {
        if !pause(interval) {
            return Err(Failure::Interrupted);
        }
        return told(&first, &look(connection)?, args.output.json);
    }
    if args.output.json || !io::stdout().is_terminal() {
        return lines(connection, first, interval, args.output.json);
    }
    let connection = Connection::new(socket, PATIENCE).context("cannot start the admin client")?;
    live(&connection, first, interval)?;
    Ok(String::new())
}

fn told(before: &Look, now: &Look, json: bool) -> Result<String, Failure> {
    let report = Report::between(before, now);
    match json {
        true => Ok(view::line(&report)?),
        false => Ok(report.text(None)),
    }
}

/// One report after another, for whoever reads them.
fn lines(
    connection: &Connection,
    first: Look,
    interval: Duration,
    json: bool,
) -> Result<String, Failure> {
    let mut before = first;
    while pause(interval) {
        let now = look(connection)?;
        let mut text = told(&before, &now, json)?;
        if !json {
            text.push('\n');
        }
        let mut out = io::stdout().lock();
        if let Err(error) = out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            return match error.kind() {
                io::ErrorKind::BrokenPipe => Ok(String::new()),
                _ => Err(anyhow::Error::new(error).context("cannot write the result").into()),
            };
        }
        before = now;
    }
    Ok(String::new())
}

fn live(connection: &Connection, first: Look, interval: Duration) -> Result<(), Failure> {
    let terminal = Terminal::take().context("cannot use the terminal")?;
    let mut report = Report::between(&first, &first);
    let (mut before, mut silent_since) = (first, None);
    loop {
        let silence = silent_since.map(|since: Instant| since.elapsed());
        terminal.show(&report.text(silence)).context("cannot write to the terminal")?;
        if !terminal.wait(if silence.is_some() { Duration::ZERO } else { interval }) {
            return Ok(());
        }
        match look(connection) {
            Ok(now) => {
                report = Report::between(&before, &now);
                (before, silent_since) = (now, None);
            }
            Err(Failure::Unreachable { .. } | Failure::Silent { .. }) => {
                silent_since.get_or_insert_with(Instant::now);
                // One that is refused at once is not asked again at once.
                if !terminal.wait(Duration::from_millis(100)) {
                    return Ok(());
                }
            }
            Err(failure) => return Err(failure),
        }
    }
}

/// False after Ctrl-C.
fn pause(time: Duration) -> bool {
    let until = Instant::now() + time;
    while !is_interrupted() {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return true;
        }
        std::thread::sleep(left.min(Duration::from_millis(50)));
    }
    false
}

/// What there is to show.
#[derive(Debug, Serialize)]
struct Report {
    version: String,
    pid: u32,
    generation: u32,
    uptime_ms: u64,
    sessions: usize,
    takeovers: u64,
    last_takeover: Option<view::Takeover>,
    interval_s: f64,
    total: Line,
    volumes: Vec<Line>,
}

/// A volume, or all of them.
#[derive(Debug, Default, Serialize)]
struct Line {
    name: String,
    sessions: u32,
    iops: f64,
    read_bytes_per_s: f64,
    write_bytes_per_s: f64,
    errors_per_s: f64,
    latency_p50_us: Option<f64>,
    latency_p99_us: Option<f64>,
    in_flight: u32,
    stalled: u32,
    oldest_request_ms: u64,
    parked: bool,
    requests: u64,
    errors: u64,
}

impl Line {
    fn new(volume: &Volume, rates: &Rates) -> Line {
        let ops = volume.counters.iter().flat_map(|counters| &counters.ops);
        let (requests, errors) =
            ops.fold((0, 0), |(requests, errors), op| (requests + op.requests, errors + op.errors));
        Line {
            name: volume.name.clone(),
            sessions: volume.sessions,
            in_flight: volume.in_flight,
            stalled: volume.stalled,
            oldest_request_ms: volume.oldest_request_ms,
            parked: volume.parked,
            requests,
            errors,
            ..Line::of_rates(rates)
        }
    }

    fn of_rates(rates: &Rates) -> Line {
        Line {
            iops: rates.iops,
            read_bytes_per_s: rates.read_bytes_per_s,
            write_bytes_per_s: rates.write_bytes_per_s,
            errors_per_s: rates.errors_per_s,
            latency_p50_us: rates.latency_p50_us,
            latency_p99_us: rates.latency_p99_us,
            ..Line::default()
        }
    }

    fn total(lines: &[Line], rates: &Rates) -> Line {
        let total = Line { name: "total".into(), ..Line::of_rates(rates) };
        lines.iter().fold(total, |mut total, line| {
            total.sessions += line.sessions;
            total.in_flight += line.in_flight;
            total.stalled += line.stalled;
            total.oldest_request_ms = total.oldest_request_ms.max(line.oldest_request_ms);
            total.parked |= line.parked;
            total.requests += line.requests;
            total.errors += line.errors;
            total
        })
    }

    fn cells(&self) -> Vec<String> {
        let mib = |bytes: f64| format!("{:.1}", bytes / f64::from(1 << 20));
        let time =
            |us: Option<f64>| us.map_or("-".into(), |us| Micros(us.ceil() as u64).to_string());
        let oldest = match self.oldest_request_ms {
            0 => "-".into(),
            ms => Micros(ms.saturating_mul(1000)).to_string(),
        };
        vec![
            self.name.clone(),
            self.sessions.to_string(),
            Count(self.iops.round() as u64).to_string(),
            mib(self.read_bytes_per_s),
            mib(self.write_bytes_per_s),
            time(self.latency_p50_us),
            time(self.latency_p99_us),
            self.in_flight.to_string(),
            oldest,
            self.stalled.to_string(),
            Count(self.errors).to_string(),
            if self.parked { "yes".into() } else { "-".into() },
        ]
    }
}

impl Report {
    fn between(before: &Look, now: &Look) -> Report {
        let status = &now.status;
        let interval = now.at.saturating_duration_since(before.at);
        let (rates, all) = rates::between(&before.status, status, interval);
        let mut volumes: Vec<Line> = status
            .volumes
            .iter()
            .zip(&rates)
            .map(|(volume, rates)| Line::new(volume, rates))
            .collect();
        let total = Line::total(&volumes, &all);
        // What needs somebody comes first, then what is busy.
        volumes.sort_by(|a, b| {
            let trouble = |line: &Line| (line.parked, line.stalled > 0);
            let busy = b.iops.total_cmp(&a.iops);
            trouble(b).cmp(&trouble(a)).then(busy).then_with(|| a.name.cmp(&b.name))
        });
        Report {
            version: status.version.clone(),
            pid: status.pid,
            generation: status.generation,
            uptime_ms: status.uptime_ms,
            sessions: status.sessions.len(),
            takeovers: status.takeovers,
            last_takeover: status.last_takeover.as_ref().map(view::Takeover::from),
            interval_s: interval.as_secs_f64(),
            total,
            volumes,
        }
    }

    /// For people; `silence`: for how long there has been no answer.
    fn text(&self, silence: Option<Duration>) -> String {
        let mut text = String::new();
        let up = match silence {
            None => format!("up {}", Micros(self.uptime_ms.saturating_mul(1000))),
            Some(silence) => {
                format!("NO ANSWER for {}", Micros(silence.as_micros() as u64))
            }
        };
        let _ = writeln!(
            text,
            "nebd-server {}, pid {}, generation {}, {up}",
            self.version, self.pid, self.generation
        );
        let _ = writeln!(text, "{}", takeovers(self.takeovers, self.last_takeover.as_ref()));
        let mut table = Table::new(&[
            "VOLUME",
            ">SESSIONS",
            ">IOPS",
            ">READ MiB/s",
            ">WRITE MiB/s",
            ">P50",
            ">P99",
            ">IN FLIGHT",
            ">OLDEST",
            ">STALLED",
            ">ERRORS",
            "PARKED",
        ]);
        table.row(self.total.cells());
        self.volumes.iter().for_each(|line| table.row(line.cells()));
        let _ = write!(text, "\n{table}");
        text
    }
}

/// How often servers took over, and how the last takeover went.
pub fn takeovers(count: u64, last: Option<&view::Takeover>) -> String {
    let Some(last) = last else { return "no takeovers".into() };
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let ago_ms = (now.as_millis() as u64).saturating_sub(last.unix_ms);
    let blackout = match last.blackout_us {
        0 => "nothing waited".into(),
        us => format!("longest blackout {}", Micros(us)),
    };
    let ago = Micros(ago_ms.saturating_mul(1000));
    format!("takeovers {count}, the last {ago} ago ({}), {blackout}", last.kind)
}

/// As [`takeovers`], of a status.
pub fn takeovers_of(status: &Status) -> String {
    let last: Option<&Takeover> = status.last_takeover.as_ref();
    takeovers(status.takeovers, last.map(view::Takeover::from).as_ref())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look_with(names: &[(&str, bool, u32)]) -> Look {
        let volume = |(name, parked, stalled): &(&str, bool, u32)| Volume {
            name: (*name).into(),
            parked: *parked,
            stalled: *stalled,
            ..Volume::default()
        };
        let volumes = names.iter().map(volume).collect();
        let last = Takeover { kind: "killed".into(), blackout_us: 8300, ..Takeover::default() };
        let status = Status {
            pid: 7,
            takeovers: 3,
            last_takeover: Some(last),
            volumes,
            ..Status::default()
        };
        Look { status, at: Instant::now() }
    }

    #[test]
    fn trouble_stands_first_and_the_head_tells_of_the_last_takeover() {
        let now = look_with(&[("a", false, 0), ("b", false, 2), ("c", true, 0)]);
        let report = Report::between(&now, &now);
        let names: Vec<&str> = report.volumes.iter().map(|line| line.name.as_str()).collect();
        assert_eq!(names, ["c", "b", "a"]);
        let text = report.text(None);
        for part in ["pid 7", "takeovers 3", "(killed)", "8.30 ms", "total"] {
            assert!(text.contains(part), "{part} is missing in:\n{text}");
        }
        assert!(report.text(Some(PATIENCE)).contains("NO ANSWER"));
    }
}
