//! The parts of the kit, each by itself.
//! One program, so that it is built and linked once.

#![allow(missing_docs, unreachable_pub)]

mod faulty;
mod helpers;
mod leases;
mod mission_consuming;
mod mission_serializers;
mod proxy;
mod refusals;
mod runner;
