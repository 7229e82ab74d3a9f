from django.urls import path
from orders import views

urlpatterns = [
    path("orders/<uuid:order_id>", views.place_order),
    path("orders/<uuid:order_id>/seen", views.see_order),
]
