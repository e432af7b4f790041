//! One case of the suite, and what decides about it.

use std::fmt;

use futures_util::future::BoxFuture;
use polymq_core::Capabilities;

use crate::{Cx, Harness};

/// The body of a case; it panics when the backend breaks the contract.
pub type Run = fn(Cx) -> BoxFuture<'static, ()>;

/// One case: a name, what it does, and what a backend must declare for it.
#[derive(Clone, Copy)]
pub struct Case {
    /// The number in the list of cases, and what it shows: `S1_delayed_nack`.
    pub id: &'static str,
    pub(crate) run: Run,
    pub(crate) gate: Option<Gate>,
    pub(crate) place: Place,
    pub(crate) tool: Option<Needed>,
}

/// What the surroundings must have for a case.
#[derive(Clone, Copy)]
pub(crate) struct Needed {
    pub(crate) name: &'static str,
    pub(crate) given: fn(&dyn Harness) -> Result<(), &'static str>,
}

/// A capability that decides between a case and its refusal.
#[derive(Clone, Copy)]
pub(crate) struct Gate {
    pub(crate) capability: &'static str,
    pub(crate) holds: fn(&Capabilities) -> bool,
    pub(crate) refusal: Run,
}

/// Beside what a case may run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// Beside others.
    Shared,
    /// Beside nothing: it looks at the whole process.
    Alone,
    /// With a broker, beside others.
    Broker,
    /// With a broker that it may kill.
    OwnBroker,
}

impl Case {
    pub(crate) const fn new(id: &'static str, run: Run) -> Self {
        Self { id, run, gate: None, place: Place::Shared, tool: None }
    }

    /// Without this capability, `refusal` is what must hold.
    pub(crate) const fn when(
        mut self,
        capability: &'static str,
        holds: fn(&Capabilities) -> bool,
        refusal: Run,
    ) -> Self {
        self.gate = Some(Gate { capability, holds, refusal });
        self
    }

    /// Where the surroundings have no such thing they say why, and that is what the summary tells.
    pub(crate) const fn with(
        mut self,
        name: &'static str,
        given: fn(&dyn Harness) -> Result<(), &'static str>,
    ) -> Self {
        self.tool = Some(Needed { name, given });
        self
    }

    pub(crate) const fn alone(mut self) -> Self {
        self.place = Place::Alone;
        self
    }

    pub(crate) const fn broker(mut self) -> Self {
        self.place = Place::Broker;
        self
    }

    pub(crate) const fn own_broker(mut self) -> Self {
        self.place = Place::OwnBroker;
        self
    }

    /// Whether it needs a broker outside of the process.
    #[must_use]
    pub const fn needs_broker(&self) -> bool {
        matches!(self.place, Place::Broker | Place::OwnBroker)
    }

    /// What the broker must have besides, if anything.
    #[must_use]
    pub fn needs_tool(&self) -> Option<&'static str> {
        self.tool.map(|tool| tool.name)
    }

    /// The capability that a backend with these declares it has not, if that is what decides.
    #[must_use]
    pub fn decided_by(&self, capabilities: &Capabilities) -> Option<&'static str> {
        self.gate.filter(|gate| !(gate.holds)(capabilities)).map(|gate| gate.capability)
    }
}

impl fmt::Debug for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.id)
    }
}

/// A case's function as a value.
macro_rules! run {
    ($function:path) => {
        |cx| Box::pin($function(cx))
    };
}
pub(crate) use run;
