//! Runs the cases: each is one test, with a runtime of its own.

use std::{
    any::Any,
    collections::BTreeMap,
    process::ExitCode,
    sync::{Arc, Mutex, OnceLock, PoisonError, RwLock},
    time::{Duration, Instant},
};

use libtest_mimic::{Arguments, Failed, Trial};
use tokio::runtime::{Builder, Runtime};

use crate::{
    Case, Clock, Cx, Figures, Harness,
    case::Place,
    cases,
    cx::{CONNECTING, lock},
    figures,
    mutant::{self, Broken, Mutant},
    tools::UNSAID,
};

/// How long one case may take; a case that hangs is a failed one.
const CASE_LIMIT: Duration = Duration::from_secs(600);
/// Most cases wait for a broker, so more of them run at a time than there are processors.
const THREADS: usize = 8;

type Start = Box<dyn Fn(Use) -> Arc<dyn Harness> + Send + Sync>;

/// What surroundings are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// Cases that run beside each other and leave the broker alone.
    Shared,
    /// Cases that kill the broker, one after the other: what it has accepted must survive.
    Kill,
}

/// The suite on one backend. See the [crate](crate) for a whole example.
pub struct Suite {
    name: &'static str,
    start: Start,
    shared: OnceLock<Arc<dyn Harness>>,
    own: Mutex<Option<Arc<dyn Harness>>>,
    /// Why there is no broker to kill.
    in_process: Option<&'static str>,
    only_faults: bool,
    without_faults: bool,
    mutants: bool,
    mutants_of: &'static [&'static str],
    /// Taken for writing by a case that must be alone.
    together: RwLock<()>,
    report: Mutex<Report>,
}

#[derive(Default)]
struct Report {
    left: usize,
    passed: usize,
    failed: usize,
    caught: usize,
    missed: usize,
    elsewhere: usize,
    decided: BTreeMap<&'static str, Vec<&'static str>>,
    notes: Vec<String>,
}

impl Suite {
    /// The suite on a backend. `start` makes its surroundings; it is called when the first case needs them, and once
    /// more for the cases that kill their broker. It may block, and panics when the broker cannot be started.
    pub fn new<H: Harness>(name: &'static str, start: impl Fn(Use) -> H + Send + Sync + 'static) -> Self {
        Self {
            name,
            in_process: None,
            only_faults: false,
            without_faults: false,
            mutants: false,
            mutants_of: &[],
            start: Box::new(move |purpose| Arc::new(start(purpose))),
            shared: OnceLock::new(),
            own: Mutex::new(None),
            together: RwLock::new(()),
            report: Mutex::default(),
        }
    }

    /// There is no broker to kill and no wire to look at, and the cases that need one are left out; the summary says it, and why.
    #[must_use]
    pub fn in_process(mut self, why: &'static str) -> Self {
        self.in_process = Some(why);
        self
    }

    /// Only the faults that need a broker; for a backend that has another test for the rest, since the two need
    /// different surroundings.
    #[must_use]
    pub fn only_faults(mut self) -> Self {
        self.only_faults = true;
        self
    }

    /// Without the faults that need a broker, which the summary says; for a mode of a backend that they do not see, since another
    /// test has them.
    #[must_use]
    pub fn without_faults(mut self) -> Self {
        self.without_faults = true;
        self
    }

    /// Tests the suite itself too: each case must fail with each of its [mutants](crate::mutant). A backend that lives
    /// in the process does that for the cases that need no broker, one with a broker for the others.
    #[must_use]
    pub fn and_mutants(mut self) -> Self {
        self.mutants = true;
        self
    }

    /// The same for these cases only, which need what not every broker has.
    #[must_use]
    pub fn and_mutants_of(mut self, cases: &'static [&'static str]) -> Self {
        self.mutants_of = cases;
        self
    }

    /// Runs what the command line asks for, as any test binary does; the `main` of a test with `harness = false`. Takes the
    /// log of the process, which goes to standard error as `RUST_LOG` says.
    ///
    /// In a child process that a case has started, it does what that case wants and never returns.
    pub fn main(self) -> ExitCode {
        crate::child::run_if_child();
        crate::captured::install();
        quiet_panics();
        let mut arguments = Arguments::from_args();
        arguments.test_threads.get_or_insert(THREADS);
        let suite = Arc::new(self);
        let trials = suite.trials();
        let chosen = trials.iter().filter(|trial| !arguments.is_filtered_out(trial)).count();
        lock(&suite.report).left = chosen;
        let conclusion = libtest_mimic::run(&arguments, trials);
        // Statics are never dropped and brokers must be stopped: the harnesses end here.
        drop(suite);
        conclusion.exit_code()
    }

    fn shared(&self) -> &Arc<dyn Harness> {
        self.shared.get_or_init(|| (self.start)(Use::Shared))
    }

    fn trials(self: &Arc<Self>) -> Vec<Trial> {
        let trial = |(case, mutant): (&'static Case, Option<&'static Mutant>)| {
            let suite = Arc::clone(self);
            let name = match mutant {
                None => format!("{}::{}", self.name, case.id),
                Some(mutant) => format!("{}::{}_catches_{}", self.name, case.id, mutant.name),
            };
            Trial::test(name, move || suite.run(case, mutant))
        };
        let fault = |case: &Case| case.id.starts_with('F') && case.needs_broker();
        let belongs = |case: &&Case| if fault(case) { !self.without_faults } else { !self.only_faults };
        for named in self.mutants_of {
            assert!(cases::all().any(|case| case.id == *named), "there is no case {named}");
        }
        let in_process = self.in_process.is_some();
        let plain =
            cases::all().filter(|case| !(in_process && case.needs_broker())).filter(belongs).map(|case| (case, None));
        let broken = cases::all()
            .filter(|case| self.mutants && case.needs_broker() != in_process || self.mutants_of.contains(&case.id))
            .flat_map(|case| mutant::of(case).map(move |mutant| (case, Some(mutant))));
        let (own, others): (Vec<_>, Vec<_>) = plain.chain(broken).partition(|(case, _)| case.place == Place::OwnBroker);
        // Those wait for each other: spread among the others, they keep the rest going.
        let every = others.len() / (own.len() + 1) + 1;
        let mut own = own.into_iter();
        let mut trials = Vec::new();
        for chunk in others.chunks(every) {
            trials.extend(own.next().map(trial));
            trials.extend(chunk.iter().copied().map(trial));
        }
        trials.extend(own.map(trial));
        if let Some(why) = self.in_process {
            let left_out: Vec<_> = cases::all().filter(|case| case.needs_broker()).map(|case| case.id).collect();
            lock(&self.report).decided.insert(why, left_out);
        }
        if self.without_faults {
            let left_out: Vec<_> = cases::all().filter(|case| fault(case)).map(|case| case.id).collect();
            lock(&self.report).decided.insert("another test of this backend has the faults", left_out);
        }
        trials
    }

    fn run(self: &Arc<Self>, case: &'static Case, mutant: Option<&'static Mutant>) -> Result<(), Failed> {
        let timed = |harness: &Arc<dyn Harness>| {
            let began = Instant::now();
            (run_against(case, harness, mutant), began.elapsed())
        };
        let (outcome, took) = match case.place {
            Place::Shared | Place::Broker => {
                let _together = self.together.read().unwrap_or_else(PoisonError::into_inner);
                timed(self.shared())
            }
            Place::Alone => {
                let _alone = self.together.write().unwrap_or_else(PoisonError::into_inner);
                timed(self.shared())
            }
            Place::OwnBroker => {
                let mut own = lock(&self.own);
                let _together = self.together.read().unwrap_or_else(PoisonError::into_inner);
                timed(own.get_or_insert_with(|| (self.start)(Use::Kill)))
            }
        };
        if took > Duration::from_secs(60) {
            lock(&self.report).notes.push(format!("{}: slow, took {} s", case.id, took.as_secs()));
        }
        self.finished(case, mutant, &outcome);
        outcome.result.map_err(|text| Failed::from(text.as_str()))
    }

    fn finished(&self, case: &'static Case, mutant: Option<&'static Mutant>, outcome: &Outcome) {
        let mut report = lock(&self.report);
        report.left = report.left.saturating_sub(1);
        match (&outcome.result, mutant) {
            (Ok(()), None) => report.passed += 1,
            (Err(_), None) => report.failed += 1,
            (Ok(()), Some(_)) if outcome.decided.is_some() => report.elsewhere += 1,
            (Ok(()), Some(_)) => report.caught += 1,
            (Err(_), Some(_)) => report.missed += 1,
        }
        if let (Some(capability), None) = (outcome.decided, mutant) {
            report.decided.entry(capability).or_default().push(case.id);
        }
        if mutant.is_none() {
            let what = match (&outcome.result, outcome.decided) {
                (Err(_), _) => "failed".to_owned(),
                (Ok(()), Some(why)) if case.tool.is_some() => why.to_owned(),
                (Ok(()), Some(capability)) => format!("not declared: {capability}"),
                (Ok(()), None) => "passed".to_owned(),
            };
            figures::write(self.name, case.id, &what, outcome.figures.as_ref());
        }
        report.notes.extend(outcome.figures.iter().map(|figures| format!("{}: {figures}", case.id)));
        report.notes.extend(outcome.notes.iter().cloned());
        if report.left == 0 {
            println!("{}", report.text(self.name));
        }
    }
}

impl Report {
    /// Printed when the last case has ended, before libtest's own last line.
    fn text(&self, name: &str) -> String {
        let decided: usize = self.decided.values().map(Vec::len).sum();
        let ran = self.passed + self.failed;
        let mut text =
            format!("\nsummary of {name}: {ran} ran, {} failed; {decided} decided by what it declares", self.failed);
        for (why, cases) in &self.decided {
            text += &format!("\n  {why}: {}", cases.join(", "));
        }
        if self.caught + self.missed > 0 {
            text += &format!("\n  broken backends: {} caught, {} missed", self.caught, self.missed);
            if self.elsewhere > 0 {
                text += &format!(", {} left to backends that have what their cases need", self.elsewhere);
            }
        }
        for note in &self.notes {
            text += &format!("\n  note: {note}");
        }
        text
    }
}

impl std::fmt::Debug for Suite {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Suite").field("name", &self.name).finish_non_exhaustive()
    }
}

fn run_against(case: &'static Case, harness: &Arc<dyn Harness>, mutant: Option<&'static Mutant>) -> Outcome {
    let Some(mutant) = mutant else { return run_case(case, harness) };
    let broken: Arc<dyn Harness> = Arc::new(Broken::new(Arc::clone(harness), mutant));
    let outcome = run_case(case, &broken);
    if case.tool.is_some() && outcome.decided.is_some() && outcome.result.is_ok() {
        // Another backend has what the case needs, and catches the mutant.
        return Outcome { figures: None, ..outcome };
    }
    let result = match outcome.result {
        Err(why) if why.starts_with(CONNECTING) => {
            Err(format!("{case:?} with {} could not connect, which shows nothing: {why}", mutant.name))
        }
        Ok(()) => Err(format!("{case:?} does not notice that the backend {}", mutant.name.replace('_', " "))),
        Err(why) => {
            println!("caught: {case:?} with {}: {}", mutant.name, why.lines().next().unwrap_or_default());
            Ok(())
        }
    };
    // A broker that a broken run has left down is no fault of the next case.
    Outcome { result, decided: None, figures: None, notes: Vec::new() }
}

/// How one run of a case ended.
#[derive(Debug)]
pub struct Outcome {
    /// What was wrong, in words.
    pub result: Result<(), String>,
    /// The capability whose absence was tested instead.
    pub decided: Option<&'static str>,
    /// What was counted.
    pub figures: Option<Figures>,
    /// Lines for the summary.
    pub notes: Vec<String>,
}

/// Runs one case now, on a runtime of its own. Blocks; not to be called from async code.
#[must_use]
pub fn run_case(case: &'static Case, harness: &Arc<dyn Harness>) -> Outcome {
    let runtime = runtime(harness.clock());
    let cx = Cx::new(Arc::clone(harness), case.id);
    let decided = case.decided_by(cx.capabilities());
    if case.needs_broker() && decided.is_none() && harness.broker().is_none() {
        let result = Err("this case needs a broker; the harness has none".to_owned());
        return Outcome { result, decided, figures: None, notes: Vec::new() };
    }
    if let Some(Err(why)) = case.tool.map(|tool| (tool.given)(harness.as_ref())) {
        let result = if why == UNSAID { Err(why.to_owned()) } else { Ok(()) };
        return Outcome { result, decided: Some(why), figures: None, notes: Vec::new() };
    }
    let run = match case.gate {
        Some(gate) if decided.is_some() => gate.refusal,
        _ => case.run,
    };
    let result = runtime.block_on(async {
        if let (Place::OwnBroker, Some(broker)) = (case.place, harness.broker()) {
            // The case before may have left it down, or in trouble.
            broker.start().await;
            for trouble in [harness.alarm(), harness.throttle()].into_iter().flatten() {
                trouble.turn(false).await;
            }
        }
        let mut task = tokio::spawn(run(cx.clone()));
        let result = match tokio::time::timeout(CASE_LIMIT, &mut task).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(match error.try_into_panic() {
                Ok(panic) => panic_text(panic.as_ref()),
                Err(error) => error.to_string(),
            }),
            Err(_) => {
                task.abort();
                Err(format!("did not end within {CASE_LIMIT:?}"))
            }
        };
        // A broken backend may hang here too.
        let _ = tokio::time::timeout(Duration::from_secs(10), cx.delete_all()).await;
        result
    });
    runtime.shutdown_timeout(Duration::from_millis(500));
    Outcome { result, decided, figures: cx.take_figures(), notes: cx.take_notes() }
}

fn runtime(clock: Clock) -> Runtime {
    let mut builder = match clock {
        Clock::Real => Builder::new_multi_thread(),
        Clock::Paused => Builder::new_current_thread(),
    };
    builder.enable_all().worker_threads(2);
    if clock == Clock::Paused {
        builder.start_paused(true);
    }
    builder.build().expect("a runtime for the case")
}

/// One line for each panic: cases that make handlers panic would fill the screen with back traces otherwise.
/// `RUST_BACKTRACE=full` still shows them.
fn quiet_panics() {
    if std::env::var_os("RUST_BACKTRACE").is_none_or(|value| value != "full") {
        std::panic::set_hook(Box::new(|panic| eprintln!("{panic}")));
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("panicked without a text").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn i6_the_summary_names_what_did_not_run_and_why() {
        let mut report = Report { passed: 3, ..Report::default() };
        report.decided.insert("there is no broker and no wire", vec!["F1_graceful_restart", "F2_kill"]);
        report.decided.entry("leases").or_default().push("S2_lease_extension");
        let text = report.text("toy");
        assert!(text.contains("summary of toy: 3 ran, 0 failed; 3 decided by what it declares"), "{text}");
        assert!(text.contains("there is no broker and no wire: F1_graceful_restart, F2_kill"), "{text}");
        assert!(text.contains("leases: S2_lease_extension"), "{text}");
    }
}
