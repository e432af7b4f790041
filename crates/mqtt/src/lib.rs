#![doc = include_str!("../README.md")]

mod backend;
mod backlog;
mod bus;
mod claims;
mod config;
mod connection;
mod consumer;
mod convert;
mod declared;
mod error;
mod greeting;
mod health;
mod hub;
mod keeper;
mod lender;
mod lends;
mod limits;
mod link;
mod pkids;
mod producer;
mod revisit;
mod settle;
mod slots;
mod stock;
mod supervisor;
mod topology;
mod wire;

pub use rumqttc;

pub use crate::{
    backend::{MqttBackend, NAME},
    config::{KEYS, MqttConfig, Protocol, TlsVersion},
};

polymq_core::register_backend!(MqttBackend);
