//! Options of a channel that only this backend knows.

use polymq_core::Result;

use crate::{config::SqsConfig, error::config};

/// How a call may differ from the settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Options {
    pub(crate) redrive: u32,
    /// It was asked for by name, and not by a setting for all.
    pub(crate) own_redrive: bool,
    pub(crate) raw_delivery: bool,
    /// What SNS lets through to this group, as its JSON.
    pub(crate) filter: Option<String>,
    /// Bodies of this queue may be SNS's JSON.
    pub(crate) unwrap: bool,
    pub(crate) subject: Option<String>,
}

const KNOWN: &str = "redrive, raw_delivery, filter, unwrap, subject";

/// What SNS lets through to a group, as its JSON: the consumer's kinds, or a policy in SNS's own words.
pub(crate) fn filter(extra: &Options, kinds: &[String]) -> Result<Option<String>> {
    match (&extra.filter, kinds) {
        (filter, []) => Ok(filter.clone()),
        (None, kinds) => Ok(Some(serde_json::json!({ crate::convert::KIND: kinds }).to_string())),
        (Some(_), _) => Err(config("option \"filter\" beside the kinds of the consumer; expected one of them")
            .with_hint(format!("write the kinds into the filter, under {:?}", crate::convert::KIND))),
    }
}

impl Options {
    pub(crate) fn read(settings: &SqsConfig, extra: &[(String, String)]) -> Result<Self> {
        let mut options = Self {
            redrive: settings.redrive,
            own_redrive: false,
            raw_delivery: settings.raw_delivery,
            filter: None,
            unwrap: false,
            subject: None,
        };
        for (key, value) in extra {
            let invalid =
                |expected: &str| config(format!("option {key:?}: {value:?} is not valid, expected {expected}"));
            let flag = || value.parse::<bool>().map_err(|_| invalid("true or false"));
            match key.as_str() {
                "redrive" => {
                    options.redrive = value.parse().ok().filter(|n| *n <= 1000).ok_or_else(|| invalid("0 to 1000"))?;
                    options.own_redrive = true;
                }
                "raw_delivery" => options.raw_delivery = flag()?,
                "unwrap" => options.unwrap = flag()?,
                "filter" => {
                    let policy: Result<serde_json::Map<_, _>, _> = serde_json::from_str(value);
                    let policy = policy.map_err(|_| invalid("a filter policy of SNS, which is a JSON object"))?;
                    options.filter = Some(serde_json::Value::Object(policy).to_string());
                }
                "subject" => options.subject = Some(value.clone()),
                _ => return Err(config(format!("unknown option {key:?}; known: {KNOWN}"))),
            }
        }
        Ok(options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(key: &str, value: &str) -> Result<Options> {
        Options::read(&SqsConfig::default(), &[(key.to_owned(), value.to_owned())])
    }

    #[test]
    fn kinds_become_a_filter_policy() {
        let (kinds, none) =
            (["order.created".to_owned(), "order.paid".to_owned()], read("unwrap", "false").expect("none"));
        let of_kinds = filter(&none, &kinds).expect("kinds");
        assert_eq!(of_kinds.as_deref(), Some(r#"{"ce-type":["order.created","order.paid"]}"#));
        let own = read("filter", r#"{"tenant": ["acme"]}"#).expect("a policy");
        assert_eq!(filter(&own, &[]).expect("a policy").as_deref(), Some(r#"{"tenant":["acme"]}"#));
        assert!(filter(&own, &kinds).expect_err("one of them").to_string().contains("ce-type"));
        assert_eq!(filter(&none, &[]).expect("none"), None);
    }

    #[test]
    fn what_is_not_known_or_not_valid_is_refused() {
        for (key, value) in [("filter", "[]"), ("redrive", "1001"), ("unwrap", "perhaps"), ("acks", "all")] {
            let sentence = read(key, value).expect_err(key).to_string();
            assert!(sentence.contains(key), "{sentence}");
        }
    }
}
