//! Each way a body or a value is refused, and what the sentence says.
#![allow(clippy::unwrap_used, reason = "a helper of tests is a test")]

use std::collections::BTreeMap;
use std::error::Error;

use crate::common::{Custom, LIMITS, Order};
use bytes::Bytes;
use polymq_serializers::{DecodeError, Format, Limits, RegistryError, SerializeError};
use serde::{Deserialize, Serialize};

const SECRET: &str = "hunter2";

#[test]
fn errors_cross_threads() {
    fn check<E: Error + Send + Sync + 'static>() {}
    check::<DecodeError>();
    check::<SerializeError>();
    check::<RegistryError>();
}

/// The sentence of a refused decode, checked for what no sentence may hold.
fn malformed<T: serde::de::DeserializeOwned + std::fmt::Debug>(format: &Format, body: &[u8]) -> String {
    let error = format.decode::<T>(body, &LIMITS).unwrap_err();
    assert!(matches!(error, DecodeError::Malformed { .. }), "{error}");
    assert!(error.source().is_some());
    let sentence = error.to_string();
    assert!(!sentence.contains(SECRET), "{sentence}");
    assert!(sentence.starts_with(&format!("cannot decode the body as {format} into `")), "{sentence}");
    sentence
}

#[test]
fn corrupt_json_is_malformed() {
    let json = Format::JSON;
    for (body, detail) in [
        (&b""[..], "it ends too early at line 1 column 0"),
        (b"{\"id\":1,\"note\":\"hunter2", "it ends too early"),
        (b"hunter2", "it is not valid JSON at line 1 column 1"),
        (b"{\"id\":1,\"lines\":[]} hunter2", "it is not valid JSON at line 1 column 21"),
        (b"{\"id\":\"hunter2, expected nothing\",\"lines\":[]}", "expected u64 at line 1 column"),
        (b"{\"id\":1}", "the field `lines` is missing at line 1 column 8"),
        (b"{\"id\":1,\"lines\":[[\"hunter2\"]]}", "expected a tuple of size 2"),
        (b"{\"id\":-1,\"lines\":[]}", "expected u64"),
        (b"{\"id\":1,\"note\":\"\xff\",\"lines\":[]}", "it is not valid JSON"),
    ] {
        let sentence = malformed::<Order>(&json, body);
        assert!(sentence.contains(detail), "{sentence}");
    }
}

#[test]
fn corrupt_message_pack_is_malformed() {
    let order = Order { id: 1, note: Some(SECRET.into()), lines: vec![("a".into(), 1)] };
    let body = Format::MESSAGE_PACK.encode(&order, &LIMITS).unwrap();
    for cut in 0..body.len() {
        malformed::<Order>(&Format::MESSAGE_PACK, &body[..cut]);
    }
    let mut longer = body.to_vec();
    longer.push(0xc0);
    assert!(malformed::<Order>(&Format::MESSAGE_PACK, &longer).contains("goes on after its value"));
    assert!(malformed::<Order>(&Format::MESSAGE_PACK, &[0xc1]).contains("reserves"));
    assert!(malformed::<u64>(&Format::MESSAGE_PACK, b"\xa7hunter2").contains("of another kind"));
    assert!(malformed::<Colour>(&Format::MESSAGE_PACK, b"\xa7hunter2").contains("does not fit"));
    assert!(malformed::<(u8, u8)>(&Format::MESSAGE_PACK, b"\x91\x01").contains("expected a tuple of size 2"));
    assert!(malformed::<String>(&Format::MESSAGE_PACK, b"\xa1\xff").contains("not valid UTF-8"));
}

#[test]
fn corrupt_text_is_malformed() {
    let text = Format::TEXT;
    assert!(malformed::<String>(&text, b"\xff").contains("it is not valid UTF-8"));
    assert!(malformed::<u8>(&text, b"256").contains("expected u8 as text"));
    assert!(malformed::<u8>(&text, SECRET.as_bytes()).contains("expected u8 as text"));
    assert!(malformed::<f64>(&text, b" 1.0").contains("expected f64 as text"));
    assert!(malformed::<bool>(&text, b"yes").contains("expected bool as text"));
    assert!(malformed::<char>(&text, b"ab").contains("expected char as text"));
    assert!(malformed::<Colour>(&text, SECRET.as_bytes()).contains("does not fit"));
    assert!(malformed::<Order>(&text, b"{}").contains("not a struct; use \"json\" or \"msgpack\""));
    assert!(malformed::<Vec<u8>>(&text, b"x").contains("not a list"));
    assert!(malformed::<Option<String>>(&text, b"x").contains("not an option"));
    assert!(malformed::<BTreeMap<u8, u8>>(&text, b"x").contains("not a map"));
}

#[test]
fn bytes_that_do_not_fit_are_malformed() {
    let bytes = Format::BYTES;
    assert!(malformed::<[u8; 3]>(&bytes, b"four").contains("expected 3 bytes, found 4"));
    assert!(malformed::<Order>(&bytes, b"x").contains("not a struct; use \"json\" or \"msgpack\""));
    assert!(malformed::<String>(&bytes, SECRET.as_bytes()).contains("use the format \"text\""));
    assert!(malformed::<u64>(&bytes, b"12345678").contains("not u64"));
    assert!(malformed::<Vec<u16>>(&bytes, b"1234").contains("a list of u16"));
    assert!(malformed::<Vec<String>>(&bytes, b"1").contains("a list of strings"));
    assert!(malformed::<Colour>(&bytes, b"Red").contains("not an enum"));
}

#[test]
fn corrupt_bodies_of_a_custom_format_are_malformed() {
    let custom = Format::custom(Custom::arc("own", "application/own", 100));
    malformed::<Order>(&custom, b"");
    assert!(malformed::<u64>(&custom, b"\xa7hunter2").contains("the serializer refused it"));
}

#[test]
fn what_a_format_cannot_carry_is_refused() {
    let order = Order { id: 1, note: None, lines: vec![] };
    for (refused, words) in [
        (Format::TEXT.encode(&order, &LIMITS), "not a struct; use \"json\" or \"msgpack\""),
        (Format::TEXT.encode(&[1u8], &LIMITS), "not a list"),
        (Format::TEXT.encode(&None::<u8>, &LIMITS), "not an absent option"),
        (Format::TEXT.encode(&Bytes::new(), &LIMITS), "not bytes"),
        (Format::BYTES.encode(&order, &LIMITS), "not a struct; use \"json\" or \"msgpack\""),
        (Format::BYTES.encode("text", &LIMITS), "not a string"),
        (Format::BYTES.encode(&vec![1u16], &LIMITS), "not a list of u16"),
        (Format::BYTES.encode(&(1u8, "x"), &LIMITS), "not a list of a string"),
        (Format::JSON.encode(&BTreeMap::from([([1u8, 2], 3)]), &LIMITS), "key must be a string"),
    ] {
        let error = refused.unwrap_err();
        assert!(matches!(error, SerializeError::Unsupported { .. }));
        let sentence = error.to_string();
        assert!(sentence.starts_with("cannot encode `") && sentence.contains(words), "{sentence}");
    }
}

#[test]
fn sizes_are_limited_both_ways() {
    let limits = Limits { max_bytes: 10, ..LIMITS };
    let custom = Format::custom(Custom::arc("own", "application/own", 100));
    for format in [Format::JSON, Format::MESSAGE_PACK, Format::TEXT, custom] {
        let body = format.encode(&"x".repeat(20), &LIMITS).unwrap();
        let refused = format.encode(&"x".repeat(20), &limits).unwrap_err();
        assert!(matches!(refused, SerializeError::TooLarge { max_bytes: 10, .. }), "{refused}");
        let refused = format.decode::<String>(&body, &limits).unwrap_err();
        assert!(matches!(refused, DecodeError::TooLarge { len, max_bytes: 10 } if len == body.len()), "{refused}");
    }
    let exact = Limits { max_bytes: 4, ..LIMITS };
    assert_eq!(Format::BYTES.encode(&[0u8; 4], &exact).unwrap().len(), 4);
    assert!(Format::BYTES.decode::<Vec<u8>>(&[0; 5], &exact).is_err());
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
enum Colour {
    Red,
}

#[test]
fn a_unit_variant_is_text() {
    let body = Format::TEXT.encode(&Colour::Red, &LIMITS).unwrap();
    assert_eq!(&body[..], b"Red");
    assert_eq!(Format::TEXT.decode::<Colour>(&body, &LIMITS).unwrap(), Colour::Red);
}
