//! Calls about templates: saved machines that launches start from.

use pileus_api::{
    Operation, PrunedTemplate, Template, TemplatePruneQuery, TemplateRequest, routes,
};
use pileus_base::Result;
use reqwest::Method;

use crate::Client;

impl Client {
    pub async fn templates(&self) -> Result<Vec<Template>> {
        self.get(routes::TEMPLATES).await
    }

    /// One template, by its ID or the ID's first digits.
    pub async fn template(&self, id: &str) -> Result<Template> {
        self.get(&routes::fill(routes::TEMPLATE, id)).await
    }

    /// Boots a machine and saves it; the operation's target is the image.
    pub async fn create_template(&self, request: &TemplateRequest) -> Result<Operation> {
        self.post(routes::TEMPLATES, request).await
    }

    /// Deletes a template, by its ID or the ID's first digits.
    pub async fn delete_template(&self, id: &str) -> Result<PrunedTemplate> {
        let path = routes::fill(routes::TEMPLATE, id);
        self.answer(self.request(Method::DELETE, &path)).await
    }

    /// Removes the templates that no launch would use any more, or all that can go.
    pub async fn prune_templates(&self, all: bool) -> Result<Vec<PrunedTemplate>> {
        let request = self.request(Method::POST, routes::TEMPLATES_PRUNE);
        self.answer(request.query(&TemplatePruneQuery { all }))
            .await
    }
}
