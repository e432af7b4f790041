//! Deliberately broken backends: each case of the suite must catch at least one of them.
//!
//! A mutant is a [`Twist`] with a name and the cases that must fail with it. [`Suite::and_mutants`](crate::Suite::and_mutants)
//! runs them.

mod administering;
mod asking;
mod connecting;
mod crossing;
mod delivering;
mod flowing;
mod sending;
mod settling;

use std::{net::SocketAddr, sync::Arc};

use polymq_core::{Address, Backend};

use crate::{
    BareClient, BrokerControl, Case, Clock, Deletion, Denied, Harness, Heartbeat, Passwords, Switch, Tool,
    twist::{Twist, Twisted},
};

/// A way in which a backend is broken.
#[derive(Clone, Copy)]
pub struct Mutant {
    /// What it does wrong.
    pub name: &'static str,
    /// The cases that must catch it.
    pub caught_by: &'static [&'static str],
    make: fn() -> Arc<dyn Twist>,
}

impl std::fmt::Debug for Mutant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

const fn mutant(name: &'static str, make: fn() -> Arc<dyn Twist>, caught_by: &'static [&'static str]) -> Mutant {
    Mutant { name, caught_by, make }
}

/// Every mutant.
pub fn all() -> impl Iterator<Item = &'static Mutant> {
    [
        sending::MUTANTS,
        delivering::MUTANTS,
        settling::MUTANTS,
        connecting::MUTANTS,
        asking::MUTANTS,
        administering::MUTANTS,
        flowing::MUTANTS,
        crossing::MUTANTS,
    ]
    .into_iter()
    .flatten()
}

/// The mutants that a case must catch.
pub fn of(case: &Case) -> impl Iterator<Item = &'static Mutant> {
    let id = case.id;
    all().filter(move |mutant| mutant.caught_by.contains(&id))
}

/// The backend with the mutant of this name around it, or as it is without one.
pub(crate) fn by_name(name: Option<&str>, backend: Arc<dyn Backend>) -> Arc<dyn Backend> {
    match name {
        None => backend,
        Some(name) => {
            let mutant = all().find(|mutant| mutant.name == name).unwrap_or_else(|| panic!("no mutant {name}"));
            Twisted::around(backend, (mutant.make)())
        }
    }
}

/// A harness whose backend is broken.
#[derive(Debug)]
pub struct Broken {
    harness: Arc<dyn Harness>,
    mutant: &'static Mutant,
    twist: Arc<dyn Twist>,
}

impl Broken {
    /// This harness with a fresh mutant.
    #[must_use]
    pub fn new(harness: Arc<dyn Harness>, mutant: &'static Mutant) -> Self {
        Self { harness, mutant, twist: (mutant.make)() }
    }
}

impl Harness for Broken {
    fn backend(&self) -> Arc<dyn Backend> {
        self.harness.backend()
    }

    fn url(&self, at: Option<SocketAddr>) -> String {
        self.harness.url(at)
    }

    fn wrap(&self, backend: Arc<dyn Backend>) -> Arc<dyn Backend> {
        Twisted::around(self.harness.wrap(backend), Arc::clone(&self.twist))
    }

    fn clock(&self) -> Clock {
        self.harness.clock()
    }

    fn broker(&self) -> Option<&dyn BrokerControl> {
        self.harness.broker()
    }

    fn bare(&self) -> Option<&dyn BareClient> {
        self.harness.bare()
    }

    fn wrong_password(&self) -> Option<String> {
        self.harness.wrong_password()
    }

    fn denied(&self) -> Option<Denied> {
        self.harness.denied()
    }

    fn heartbeat(&self) -> Option<Heartbeat> {
        self.harness.heartbeat()
    }

    fn child_environment(&self) -> Vec<(String, String)> {
        let mut variables = self.harness.child_environment();
        variables.push(crate::child::mutant_variable(self.mutant.name));
        variables
    }

    fn bad_names(&self) -> Vec<(Address, &'static str)> {
        self.harness.bad_names()
    }

    fn anybody_may_look(&self) -> bool {
        self.harness.anybody_may_look()
    }

    fn time_outs(&self) -> Vec<&'static str> {
        self.harness.time_outs()
    }

    fn soon(&self) -> std::time::Duration {
        self.harness.soon()
    }

    fn backlog(&self) -> usize {
        self.harness.backlog()
    }

    fn at_once(&self) -> usize {
        self.harness.at_once()
    }

    fn deliveries_outlive_connections(&self) -> bool {
        self.harness.deliveries_outlive_connections()
    }

    fn passwords(&self) -> Tool<'_, dyn Passwords> {
        self.harness.passwords()
    }

    fn alarm(&self) -> Tool<'_, dyn Switch> {
        self.harness.alarm()
    }

    fn throttle(&self) -> Tool<'_, dyn Switch> {
        self.harness.throttle()
    }

    fn deletes_in_use(&self) -> Tool<'_, Deletion> {
        self.harness.deletes_in_use()
    }

    fn members(&self) -> Tool<'_, ()> {
        self.harness.members()
    }

    fn write_lag(&self) -> std::time::Duration {
        self.harness.write_lag()
    }

    fn recovery(&self) -> std::time::Duration {
        // It is to fail: waiting long for that would only take time.
        self.harness.recovery() / 4
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_has_a_mutant() {
        let without: Vec<_> = crate::cases::all().filter(|case| of(case).next().is_none()).collect();
        assert!(without.is_empty(), "a case without a mutant is not finished: {without:?}");
    }

    #[test]
    fn every_mutant_has_a_name_and_cases_of_its_own() {
        let mut names: Vec<_> = all().map(|mutant| mutant.name).collect();
        for mutant in all() {
            assert!(!mutant.caught_by.is_empty(), "{mutant:?}");
            for id in mutant.caught_by {
                assert!(crate::cases::find(id).is_some(), "{mutant:?} names {id}, which is no case");
            }
        }
        names.sort_unstable();
        assert!(names.windows(2).all(|pair| pair[0] != pair[1]), "{names:?}");
    }
}
